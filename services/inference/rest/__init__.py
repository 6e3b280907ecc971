"""OpenAI's REST API: the text API in OpenAI's words (docs/openai.md)."""
