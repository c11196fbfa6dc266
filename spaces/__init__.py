"""What can be configured: one point, many points, named workloads (pydantic only, no torch, no ray)."""
