"""Generated from `proto/agl_grpc/v1`; never edited. `make proto` regenerates."""
