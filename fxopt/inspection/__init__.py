"""What a person looks at: graphs before and after."""
