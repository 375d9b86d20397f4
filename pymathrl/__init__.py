"""pymathrl"""
