"""Run by the host's extension manager in its own Python: adds only what is missing, never torch or gradio."""

import importlib.util
import sys

# What a host lacks on Python 3.10; later ones have it in the standard library. All else that is needed, the hosts ship.
NEEDED = {"tomli": "tomli>=2,<3"} if sys.version_info < (3, 11) else {}


def main() -> None:
    """Install what is missing; say nothing when nothing is."""
    missing = [requirement for module, requirement in NEEDED.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    try:
        import launch

        for requirement in missing:
            launch.run_pip(f'install "{requirement}"', f"{requirement} for Remote VAE")
    except Exception as error:
        # Without network the extension still works: pip brings a copy of tomli along.
        why = str(error).strip().partition("\n")[0]
        print(f"Remote VAE: could not install {', '.join(missing)} ({why}); going on without")


if __name__ == "__main__":
    main()
