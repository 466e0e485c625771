"""The networks: GRCSF with its two units, and the masked autoencoder."""
