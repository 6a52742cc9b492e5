"""The storage of studies: databases and servers, many workers, outages, lost trials."""
