"""Stores: banks whose adapters are files."""
