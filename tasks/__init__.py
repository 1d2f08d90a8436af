"""Lightning tasks: language models, image classification, diffusion and graphs."""
