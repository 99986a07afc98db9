"""What the signatures of an exported model are called; `saved_model.py` makes them."""

SIMILAR = "similar"
# Signatures that retrieve, and those that embed their queries; saved_models/README.md lists the
# inputs. `similar` embeds by itself: the index has the vectors of its items.
RETRIEVALS = {
    "retrieve_user": "embed_user",
    "retrieve": "embed_query",
    "retrieve_with_features": "embed_query_with_features",
    SIMILAR: SIMILAR,
}
# The server also answers these names with a filter, for models that have one.
FILTERED = "_filtered"
DEFAULT_SIGNATURE = "serving_default"
DEFAULT_K = 100
