"""core/caches"""
