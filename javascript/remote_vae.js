// The box in the title of the accordion "Remote VAE" shows what the settings say until the user presses it, and the lines of
// state say how things stand now.

(function () {
    const tabs = ["txt2img", "img2img", "control"];

    function checkbox(id) {
        return gradioApp().querySelector(`#${id} input[type=checkbox]`) || gradioApp().querySelector(`input#${id}`);
    }

    function set(box, checked) {
        if (box.checked === checked) return;
        box.checked = checked;
        // gradio 3 listens to one, and gradio 4 to the other.
        box.dispatchEvent(new Event("input", {bubbles: true}));
        box.dispatchEvent(new Event("change", {bubbles: true}));
    }

    function follow() {
        if (typeof opts !== "object" || !Object.keys(opts).length) return;
        const enabled = Boolean(opts.remotevae_enabled);
        for (const tab of tabs) {
            const id = `script_${tab}_remote_vae_remote_vae`;
            const box = checkbox(`${id}-checkbox`);
            const seen = checkbox(`${id}_seen`);
            if (!box || !seen || box.checked !== seen.checked) continue;
            const accordion = gradioApp().getElementById(id);
            if (accordion?.classList.contains("input-accordion")) {
                // Not before the host has given it its box.
                if (!accordion.visibleCheckbox) continue;
                if (box.checked !== enabled) inputAccordionChecked(id, enabled);
            } else {
                set(box, enabled);
            }
            set(seen, enabled);
        }
    }

    function refresh() {
        gradioApp().querySelectorAll("[id$=remote_vae_state_refresh]").forEach((button) => button.click());
    }

    // After a generation, by what then stands under its picture (SD.Next's Control tab shows the seconds alone); and when
    // somebody opens what has such a line.
    function watch() {
        let soon;
        const seen = new MutationObserver(() => {
            clearTimeout(soon);
            soon = setTimeout(refresh, 200);
        });
        for (const tab of tabs) {
            for (const text of gradioApp().querySelectorAll(`#html_info_${tab}, #html_log_${tab}`)) {
                seen.observe(text, {childList: true, subtree: true, characterData: true});
            }
        }
        document.addEventListener("click", (event) => {
            const within = "[id$=remote_vae_remote_vae] .label-wrap, #settings .tab-nav button, #tabs > .tab-nav button";
            if (event.isTrusted && event.target.closest?.(within)) refresh();
        });
    }

    if (typeof onOptionsChanged === "function") {
        onOptionsChanged(() => {
            follow();
            refresh();
        });
    }
    if (typeof onUiLoaded === "function") {
        onUiLoaded(() => {
            setTimeout(follow, 500);
            watch();
        });
    }
})();
