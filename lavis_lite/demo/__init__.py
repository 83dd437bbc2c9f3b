"""The demo: a page in the browser that tries models. `actions.py` is what it does, `page.py` its Gradio components."""
