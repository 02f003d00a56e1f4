"""The report of a run: its schema, its JSON file and its HTML page."""
