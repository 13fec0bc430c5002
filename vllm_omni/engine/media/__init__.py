"""Messages with images, sounds and videos -> what a model takes."""
