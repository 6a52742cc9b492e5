"""The Python interface, which `atp_tune` exports; the command line is written on it."""
