"""What the user of a UI sees: the settings panel, and the start of the extension."""
