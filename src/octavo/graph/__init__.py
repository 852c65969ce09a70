"""ComfyUI's graphs: read, checked and executed. Start reading at `workflow`, then `execute`."""
