"""A dense checkpoint: found or fetched, judged, and its weights brought to where they are used."""
