"""The storybook: a small drawn world, the model trained on it that ships with the package, and its measurements."""
