"""Students: data, live sampling, the teacher's client, smoothing, objectives, the loop, checkpoints, Ray."""
