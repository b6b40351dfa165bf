"""Fakes and builders that tests share: tiny models, servers, invented evaluations, commands in this process."""
