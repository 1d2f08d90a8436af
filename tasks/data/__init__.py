"""What the data of all tasks share: a cache, sampling that resumes after any batch, loaders, images."""
