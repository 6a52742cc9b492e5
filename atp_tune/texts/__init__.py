"""Texts: sources as documents, documents as windows of token ids."""
