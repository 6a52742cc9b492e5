"""Where trials are kept: databases and servers, many workers, outages, lost processes, merging."""
