"""The ground: errors, settings, console, and files on disk that are whole or absent."""
