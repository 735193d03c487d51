"""The server: an API that clients of OpenAI's speak, and a page, over the engine's scheduler in worker processes."""
