"""Bundles over HTTP, in the form of OpenAI's embeddings: ``embedge serve``.

From a request to its answer:
    * ``app`` takes it in: keys, limits, errors as JSON. ``api`` has an endpoint a function.
    * ``fields`` reads its JSON, ``meaning`` finds the task and the prompt that it means.
    * ``models`` holds the bundles, and replaces them while requests go on.
    * ``queue`` joins the texts of several requests, by tokens, and runs them one batch after the other.
    * ``process`` starts and stops the whole; ``protocol`` bounds its connections, ``hosts`` whom they may be meant for.

It runs texts by the runtime's face, :class:`embedge.runtime.Embedder`, and only the command imports it. What it needs
comes with the extra ``serve``.
"""
