"""Mistral and Ministral, dense."""
