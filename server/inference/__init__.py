"""An OpenAI-compatible server over one base model, with an adapter that may change while it answers."""
