// The page "Remote VAE" of ComfyUI's settings. Its options come from settings/options.toml, by the server.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PAGE = "Remote VAE";

async function ask(path, init) {
  const answer = await api.fetchApi(`/remote_vae/${path}`, init);
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

// A text that is shown by a click on its title, and marked as a whole by another.
function toCopy(title) {
  const box = document.createElement("details");
  const text = document.createElement("pre");
  box.append(Object.assign(document.createElement("summary"), { textContent: title }), text);
  box.style.cssText = "max-width:100%";
  text.style.cssText = "user-select:all;white-space:pre-wrap;overflow-wrap:anywhere;text-align:left";
  return [box, text];
}

// A line of state that is asked for whenever the page is shown, a button that tries the endpoint out, and what to type on the
// other machine.
function status() {
  const box = document.createElement("div");
  const button = document.createElement("button");
  const line = document.createElement("div");
  const verdict = document.createElement("div");
  const [other, commands] = toCopy("The two commands for the other machine");
  const [report, diagnosis] = toCopy("Diagnosis, to copy into a report of a problem");
  box.style.cssText = "display:flex;flex-direction:column;gap:8px;align-items:flex-end;max-width:26rem;text-align:right";
  button.textContent = "Test";
  button.className = "p-button p-component p-button-sm";
  button.onclick = async () => {
    button.disabled = true;
    verdict.textContent = "asking the endpoint ...";
    try {
      const found = await ask("test", { method: "POST" });
      verdict.textContent = `${found.good ? "✓" : "✗"} ${found.verdict}`;
      line.textContent = found.state;
    } catch (error) {
      verdict.textContent = `✗ ComfyUI does not answer: ${error.message}`;
    }
    button.disabled = false;
  };
  ask("state")
    .then((found) => {
      line.textContent = found.state;
      commands.textContent = found.commands;
      diagnosis.textContent = found.diagnosis;
    })
    .catch((error) => (line.textContent = `ComfyUI does not answer: ${error.message}`));
  box.append(line, button, verdict, other, report);
  return box;
}

// Groups and settings with higher numbers come first.
const FIRST = 1000;

function setting(option, order) {
  const { group, ...rest } = option;
  return { ...rest, category: [PAGE, group, rest.name], sortOrder: FIRST - 1 - order };
}

let options = [];
try {
  options = await ask("options");
} catch (error) {
  console.error("Remote VAE: its settings cannot be shown:", error);
}

app.registerExtension({
  name: "RemoteVAE.settings",
  settings: [
    {
      id: "RemoteVAE.status",
      name: "State",
      tooltip: "VAE decode and encode on another machine; whatever fails there is done here. Settings, Remote VAE has the commands that start a server there",
      category: [PAGE, options[0]?.group ?? PAGE, "State"],
      type: status,
      defaultValue: null,
      sortOrder: FIRST,
    },
    ...options.map(setting),
  ],
});
