"""ComfyUI loads this folder as a node pack; everything is in the package beside it. Other UIs and pip know nothing of it."""

import sys
from pathlib import Path

# Last, so that nothing of this folder stands before anybody else's modules.
sys.path.append(str(Path(__file__).resolve().parent))

from remote_vae.extension.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, start

WEB_DIRECTORY = "./web"
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

start()
