"""The subcommands of `initjax app`, one file each: `command`, a click command with the name of its application."""
