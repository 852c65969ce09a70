"""The command line: one file per command, each importing its work only when it runs."""
