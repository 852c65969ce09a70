"""The doors: ComfyUI's, AUTOMATIC1111's and OpenAI's APIs and our page, one application. Start reading at `app`."""
