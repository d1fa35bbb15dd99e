use domain::stream::ACCOUNT_EVENT;

/// Which sequenced stream a command is about.
#[derive(clap::Args)]
pub(crate) struct Stream {
    /// The stream
    #[arg(long, default_value = ACCOUNT_EVENT, value_name = "NAME")]
    pub(crate) stream: String,
}
