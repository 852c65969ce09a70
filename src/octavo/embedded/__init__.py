"""The embedded model: files only, laid out as ComfyUI's `models` folder. `octavo.train` makes them."""
