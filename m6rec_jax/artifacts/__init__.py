"""What lies on disk: schemas, manifests, digests, atomic writes, the parameters-only checkpoint reader."""
