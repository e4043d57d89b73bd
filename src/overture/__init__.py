"""Overture: a starter kit to pretrain and fine-tune transformers with Composer and Streaming."""

__version__ = "0.1.0"
