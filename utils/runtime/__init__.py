"""The process: its libraries, ranks, device and clock."""
