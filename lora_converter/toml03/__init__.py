"""torchtitan 0.2.2's TOML files and command lines as jobs of 0.3; nothing here is for 0.2.2 itself."""
