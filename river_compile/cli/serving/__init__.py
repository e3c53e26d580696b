"""An OpenAI-compatible server: River's routes and checks, transformers' answers, over a continuous batch.

The way of a request: `connections` (its end) and `access` (whose requests are answered), `app` (its route), `requests`
and `forms` (the checks). In a thread, `prompts` tokenizes its text; `batches` calls `generate`, and `streams` answers.
Not handled: several models; audio; TLS.
"""
