"""From embeddings to answers: the index, the export, the loaded retriever."""
