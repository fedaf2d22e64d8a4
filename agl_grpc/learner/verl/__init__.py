"""How verl is driven: its configuration, and our parts at the extension points that it has."""
