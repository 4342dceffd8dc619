"""From one sentence to a billion: inputs -> windows of texts -> vectors -> files that survive a kill at any moment."""
