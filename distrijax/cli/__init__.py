"""The command `distrijax`, and what its subcommands share."""
