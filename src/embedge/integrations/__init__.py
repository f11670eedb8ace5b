"""A bundle in the frameworks that people have: one module each, which imports its framework and no other does.

    from embedge.integrations.langchain import EmbedgeEmbeddings

    embeddings = EmbedgeEmbeddings("bundle", precision="int8", task="retrieval")

``langchain``, ``llama_index``, ``haystack`` and ``chroma`` hold the framework's own kind of class. ``task_encoder``
is what they share: queries by ``encode_query``, documents by ``encode_document``, one ``Embedder`` in a process.
``ray`` embeds many rows on many machines.
"""

from __future__ import annotations
