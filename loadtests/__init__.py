"""Open-loop load on a running service, and what reached the client in time.

Knows the service by its HTTP contract alone and never imports model or service.
"""
