"""Messages with pictures, videos and sounds -> a MediaPrompt, as Qwen2-VL and its kin read them."""
