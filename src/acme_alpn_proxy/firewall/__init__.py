"""What a host's firewall would do with visitors, read and judged; nothing here changes it."""
