"""A model over HTTP: an API that OpenAI's clients understand, and the editor page.

The engine owns the one thread that touches the device; everything else here is requests in, answers
out. Nothing here knows parameters or caches: those are `generate/`'s.
"""
