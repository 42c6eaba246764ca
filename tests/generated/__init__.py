"""Random modules × losses × masks × loaders × hooks, fitted for real and scored, against brute force."""
