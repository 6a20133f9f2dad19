"""Follow an object in a video of one's own: frames in (`sources`), boxes drawn (`drawing`), files
out (`writing`), and the command around them (`run`)."""
