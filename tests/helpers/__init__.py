"""What tests share: networks, censuses, oracles."""
